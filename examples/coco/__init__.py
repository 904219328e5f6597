"""Trains a detector of torchvision with a ranking loss on any data set in COCO format, and evaluates it."""
