"""What this host can do for Remora, found by trying, and for each gap the fix."""
