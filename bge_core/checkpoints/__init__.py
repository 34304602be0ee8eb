"""What a checkpoint is: its name, its files, and the catalogue. Imports no torch."""
