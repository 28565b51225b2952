"""The console script ``luna-vision``: a file for each command, which imports torch only when it runs."""
