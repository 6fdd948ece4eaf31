"""`switchkd report`: runs, read from their folders, as one HTML page."""
