"""How good pictures are: distances between sets of them, in the features of networks that the user has."""
