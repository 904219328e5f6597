"""Train a RetinaNet on scenes of handwritten digits with the aLRP Loss, on a CPU, in about three minutes."""
