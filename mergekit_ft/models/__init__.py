"""A checkpoint as a language model in memory: opened, asked, decoded."""
