"""What `close-engine demo` plays: leads of a temporary database taken through conversations, in simulated time."""
