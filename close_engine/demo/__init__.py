"""The simulation behind `close-engine demo`: leads and their conversations, in a temporary database."""
