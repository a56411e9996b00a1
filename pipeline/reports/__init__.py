"""What people read: the report of a run, comparisons, explanations of a user's images, and their
pictures.
"""
