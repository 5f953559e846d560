// Rookery-agent installs an image on the machine it runs on. As the first
// process of an initramfs it is the whole system; as a plain process it
// installs onto an image file or into a directory.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

const usage = `rookery-agent installs an image on the machine it runs on.

Usage:
  rookery-agent install --script FILE --site FILE --http URL --root DIR [--disk FILE]
        carry out one signed install script
  rookery-agent run --api URL --http URL --site FILE --root DIR [--disk FILE] [--mac MAC]
        ask a server what to do, as a netbooted machine does, and do it
  rookery-agent COMMAND --help
        what the flags of a command mean

Without --disk the image goes into the directory --root: nothing is
partitioned and no boot loader is installed; what rsync brings, where a script's
transports have it, replaces all that is there. With it, the disk (an image file
or a device) is ERASED and mounted at --root while the installation runs.

As process 1 of an initramfs the agent takes no arguments: it reads the kernel
command line (rookery.api=URL, rookery.http=URL), ` + "/etc/rookery/site.json" + ` and
/etc/rookery/modules.

Exit codes: 0 installed (or nothing to do), 1 failed, 2 wrong usage.
`

// Exit codes. Those of the endings are between the first process and its child.
const (
	exitOK       = 0
	exitFailed   = 1
	exitUsage    = 2
	exitReboot   = 10
	exitPoweroff = 11
	exitShell    = 12
)

func main() {
	if os.Getpid() == 1 {
		first() // never returns
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second ^C does not wait for the server's receipt
	os.Exit(command(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// command runs one command line and returns its exit code.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	var err error
	switch args[0] {
	case "install":
		err = installCommand(ctx, args[1:], stderr)
	case "run":
		err = runCommand(ctx, args[1:], stderr)
	case childCommand:
		return boot(ctx)
	case "help", "-h", "--help":
		fmt.Fprint(stdout, usage)
		return exitOK
	default:
		fmt.Fprintf(stderr, "rookery-agent: unknown command %q\n\n%s", args[0], usage)
		return exitUsage
	}
	switch {
	case err == nil || err == flag.ErrHelp:
		return exitOK
	case isUsage(err):
		fmt.Fprintf(stderr, "rookery-agent %s: %v (see rookery-agent %s --help)\n", args[0], err, args[0])
		return exitUsage
	}
	fmt.Fprintf(stderr, "rookery-agent %s: %v\n", args[0], err)
	return exitFailed
}
