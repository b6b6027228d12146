"""Files of weights and settings: found, checked, read whole, written whole."""
