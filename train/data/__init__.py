"""What is trained on: captioned pictures from scenes drawn by code, folders, tars and `datasets` names."""
