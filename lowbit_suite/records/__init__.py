"""What a notebook leaves behind: numbers, tables, and its trainings as lines of a journal."""
