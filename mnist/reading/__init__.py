"""Reading the numbers on users' photos and scans."""
