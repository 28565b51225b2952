"""Small things that every room of the package uses. Nothing here knows another room."""
