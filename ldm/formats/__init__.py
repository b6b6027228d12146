"""The formats of the field beside diffusers' folders: single files, pickles, and CLIP's vocabulary."""
