"""The stage graph: joined by artifacts, cached by content, resumable anywhere."""
