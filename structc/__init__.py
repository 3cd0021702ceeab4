"""structc: rewrite trained PyTorch models into fast structured forms."""
