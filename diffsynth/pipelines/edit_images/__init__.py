"""How a family reads the images to edit."""
