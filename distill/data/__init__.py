"""Input files and hub data sets flow in, ``Prompt`` and ``Reject`` records flow out."""
