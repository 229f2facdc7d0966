"""Plays twenty leads against the agency, with stand-ins for Twilio, Stripe and Claude: `make agency` runs it."""
