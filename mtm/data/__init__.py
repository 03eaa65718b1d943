"""Readers that end in a Session (ibl, nwb, kilosort, steinmetz, huggingface); many on disk."""
