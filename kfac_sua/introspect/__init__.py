"""How far each approximation of the Fisher is from the exact one on a network in training, and what closeness buys."""
