"""Ready recipes (YAML); the file name without its suffix is the recipe's name."""
