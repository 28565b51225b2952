"""What all parts of the package share, and what needs none of them."""
