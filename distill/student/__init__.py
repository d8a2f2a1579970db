"""Student room: a cache's targets and a student model flow in, trained checkpoints and held-out figures flow out."""
