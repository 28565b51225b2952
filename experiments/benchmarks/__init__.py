"""Commands that measure the package."""
