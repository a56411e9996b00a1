"""The columns of a plan: which part of each stored image is shown, and how it is moved.

A plan is (B, PLAN_COLUMNS) int32, one row an image; ``StoredImages.decode`` describes it.
"""

TOP = 0
LEFT = 1
HEIGHT = 2
WIDTH = 3
FLIP = 4
DOWN = 5
RIGHT = 6
PLAN_COLUMNS = 7
