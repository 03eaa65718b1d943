"""Recordings from elsewhere as a Session: ibl (ONE), nwb, steinmetz, neuromatch, huggingface."""
