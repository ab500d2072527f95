"""Tell the story of one small model, two experts and three merges."""
