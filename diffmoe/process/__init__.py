"""This process and its surroundings: its exit, its temporary files, its terminal, its launcher."""
