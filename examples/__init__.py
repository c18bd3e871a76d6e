"""What dropout does, on data that comes with a package."""
