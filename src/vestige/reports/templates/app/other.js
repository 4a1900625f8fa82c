/* A page without parts that move: its theme, its command, and reloading where it is served live. */
startTheme();
startCopy();
startLive();
