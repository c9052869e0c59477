"""The targets, each in a package of its own. Backends never import each other."""
