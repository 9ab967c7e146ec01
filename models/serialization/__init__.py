"""How models are written and read: files, configurations, and the form they are saved in."""
