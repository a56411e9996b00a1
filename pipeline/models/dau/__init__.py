"""Dynamic Alignment Units: the layer, the function it computes, and its kernels.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, section 3.
"""

from pipeline.models.dau.layer import DAUConv2d, Norm

__all__ = ["DAUConv2d", "Norm"]
