"""The losses side by side in training: same detector, same pictures, same budget, several seeds."""
