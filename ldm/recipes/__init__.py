"""What is asked of a picture, and the recipe it was made by. Imports no torch."""
