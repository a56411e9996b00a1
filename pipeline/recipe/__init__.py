"""The recipe: one YAML file that holds every number of a run."""
