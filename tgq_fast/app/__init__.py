"""What the terminal shows: the command line, the demo, and what only they need. It may print; nothing below does."""
