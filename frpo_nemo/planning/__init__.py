"""What a run will need, on paper: memory, time, communication. Nothing here starts anything."""
