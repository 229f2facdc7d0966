"""Which database this is: the binding, and one file for each kind of database with what differs there."""
