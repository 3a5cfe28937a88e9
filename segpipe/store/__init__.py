"""The working store: stages, receipts, locations, requests to stop."""
