"""Recordings from elsewhere as a Session (ibl, nwb, steinmetz, huggingface), and many on disk."""
