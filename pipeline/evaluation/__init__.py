"""How good a model is: metrics of its accuracy and of its explanations, computed once and kept."""
