"""Methods side by side, several training seeds each, and which differences are significant."""
