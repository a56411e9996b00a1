"""The networks, registered in timm, and the layer they are made of."""
