"""Reports for people: of a run, of several runs compared, and of explained images."""
