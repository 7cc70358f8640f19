"""What the page of a report holds: layers side by side, error curves, and the HTML itself."""
