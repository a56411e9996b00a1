"""A package that takes the place of setuptools while pip downloads archives; see build_meta."""
