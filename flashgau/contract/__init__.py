"""What arguments must be: checks shared by the public functions and by launchers that are asked to (`check=True`)."""
