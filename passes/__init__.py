"""Graph and weight work: the stages between a model and its rewritten form."""
