// Package wire has the few types that agent and server say to each other: the
// hello, the signed install script and the events. What is decoded here is
// decoded strictly: an unknown key, a missing value or trailing bytes are an
// error that names them.
package wire

import (
	"fmt"
	"time"

	"rookery/disklayout"
)

// Paths of the agent's API, all below the server's HTTPS address.
const (
	PathHello  = "/v1/hello"  // POST Hello, answers Welcome
	PathScript = "/v1/script" // GET with the Welcome's token, answers Envelope
	PathEvents = "/v1/events" // POST []Event with the token, answers 204
)

// Paths of the files that hang on the signature and are served by plain HTTP.
const (
	PathManifests = "/manifests/" // + digest: the image's OCI manifest
	PathTorrents  = "/torrents/"  // + digest: a layer's metainfo file; with FromNodes perhaps 307 to a node
	PathLayers    = "/layers/"    // + digest: a layer, with ranges
	PathAnnounce  = "/announce"   // BEP 3 HTTP tracker
	PathScrape    = "/scrape"     // BEP 48
	PathTrees     = "/trees/"     // + digest of a manifest: POST, answers Tree
	PathMulticast = "/multicast"  // POST Want, answers 202 and Sending, or 204 when it is not sent yet
)

// FromNodes is the query of who takes a torrent file from other nodes, too.
const FromNodes = "from=nodes"

// Bounds of what is accepted from the network, in bytes.
const (
	MaxHello   = 256 << 10
	MaxScript  = 1 << 20
	MaxEvents  = 1 << 20
	MaxWant    = 128 << 10
	MaxSending = 1 << 10
)

// A Hello is the first thing an agent says: what machine this is.
type Hello struct {
	Boot      string    `json:"boot"` // random, one per start of the agent
	Inventory Inventory `json:"inventory"`
}

// An Inventory is what the agent found in the machine.
type Inventory struct {
	UUID     string              `json:"uuid,omitempty"` // SMBIOS system UUID
	Serial   string              `json:"serial,omitempty"`
	Vendor   string              `json:"vendor,omitempty"`
	Product  string              `json:"product,omitempty"`
	Firmware disklayout.Firmware `json:"firmware"`
	Arch     string              `json:"arch"` // as GOARCH writes it
	CPUs     int                 `json:"cpus"`
	Memory   int64               `json:"memory"` // bytes
	NICs     []NIC               `json:"nics"`
	Disks    []disklayout.Disk   `json:"disks"`
}

// A NIC is one network interface.
type NIC struct {
	Name    string `json:"name"`
	MAC     string `json:"mac"` // lower case, colons
	Driver  string `json:"driver,omitempty"`
	Carrier bool   `json:"carrier"`
	Address string `json:"address,omitempty"` // CIDR, while the agent runs

	Neighbor *Neighbor `json:"neighbor,omitempty"` // nil: not heard
}

// A Neighbor is where the cable of a NIC goes, as the far end says by LLDP.
type Neighbor struct {
	Switch string `json:"switch"`         // its name, or what it tells itself from others by
	Port   string `json:"port,omitempty"` // "Gi1/0/7"
}

// A Tree is where the files of an image are to be had by rsync. Without a Module
// they are being made: it is asked again.
type Tree struct {
	Module  string `json:"module,omitempty"`
	Name    string `json:"name,omitempty"`    // another of the module, for people: "debian12-4"
	Address string `json:"address,omitempty"` // of the server, as it knows itself
	Port    int    `json:"port,omitempty"`    // plain; 0 is none
	TLSPort int    `json:"tlsPort,omitempty"` // with a certificate of the site's authority; 0 is none
	SSHPort int    `json:"sshPort,omitempty"` // by ssh, whose host key that authority has certified; 0 is none
	Done    int64  `json:"done,omitempty"`    // while they are made: bytes of layers that were read
	Total   int64  `json:"total,omitempty"`   // of
}

// A Welcome is the answer to a hello.
type Welcome struct {
	Do    Do     `json:"do"`
	Node  string `json:"node,omitempty"`  // the node's name, once it has one
	Token string `json:"token,omitempty"` // for the script and the events
	Why   string `json:"why,omitempty"`   // for the console, while waiting
}

// Do is what the server wants of a machine that said hello.
type Do string

// What a server can want.
const (
	Wait    Do = "wait"    // not accepted yet: show the MAC and ask again
	Install Do = "install" // fetch the script and carry it out
	Local   Do = "local"   // installed already: start from the own disk
)

// A Script tells one node what to do. It is rendered by the server and signed.
type Script struct {
	Version    int               `json:"version"` // 1
	ID         string            `json:"id"`      // of this installation; also the seed of the plan's UUIDs
	Node       string            `json:"node"`
	Image      Image             `json:"image"`
	Transports []string          `json:"transports"`            // of Transports, in order
	Multicast  *Multicast        `json:"multicast,omitempty"`   // where to listen, when it is one of the transports
	Mirrors    []string          `json:"mirrors,omitempty"`     // URLs of layers without their digest, besides the server's own
	Upload     int64             `json:"uploadLimit,omitempty"` // bytes a second; 0 is no limit
	Download   int64             `json:"downloadLimit,omitempty"`
	Layout     disklayout.Layout `json:"layout"`
	Identity   Identity          `json:"identity"`
	SeedFor    int               `json:"seedFor"`   // seconds to linger at the most
	Ending     Ending            `json:"ending"`    // after success
	OnFailure  Ending            `json:"onFailure"` // after a failure
}

// An Image names one immutable version of an image.
type Image struct {
	Name     string `json:"name"`     // "debian12:1", for people
	Manifest Digest `json:"manifest"` // what the node trusts
}

// An Identity is what makes the copy a machine of its own.
type Identity struct {
	Hostname       string    `json:"hostname"`
	Domain         string    `json:"domain,omitempty"`
	MachineID      string    `json:"machineID"` // 32 hex digits
	Network        []Network `json:"network,omitempty"`
	Nameservers    []string  `json:"nameservers,omitempty"`
	AuthorizedKeys []string  `json:"authorizedKeys,omitempty"` // root's, in authorized_keys form
	KernelArgs     string    `json:"kernelArgs,omitempty"`     // added to the installed kernel's command line
	Serial         string    `json:"serial,omitempty"`         // "ttyS0,115200": console of kernel, loader and login
}

// A Network is the configuration of one interface of the installed system.
type Network struct {
	MAC     string `json:"mac"`               // which interface
	Address string `json:"address,omitempty"` // CIDR; "" means DHCP
	Gateway string `json:"gateway,omitempty"`
}

// A Multicast is how the server sends layers to all who listen.
type Multicast struct {
	Group  string `json:"group"`          // addresses of which each layer has one, "239.192.0.0/16"
	Port   uint16 `json:"port"`           // UDP
	Server string `json:"server"`         // address that datagrams come from
	Rate   int64  `json:"rate,omitempty"` // bytes a second that this node is for; 0: as all others
}

// A Want is what a node says again and again while it wants a layer, or the torrent
// file of one, by multicast.
type Want struct {
	Client string  `json:"client"` // random, 16 hex digits
	Layer  Digest  `json:"layer"`
	Rate   int64   `json:"rate,omitempty"`   // of its script
	Lost   float64 `json:"lost"`             // share of what was sent lately, 0 to 1
	Lacks  []byte  `json:"lacks,omitempty"`  // 255ths of each block; none: everything
	Helped bool    `json:"helped,omitempty"` // others fill its holes
	Done   bool    `json:"done,omitempty"`   // wants it no more
}

// Sending says that what a node wants is sent, or is about to be.
type Sending struct {
	Size int64 `json:"size"` // of the layer or file in bytes, at least 1
}

// An Ending is what happens to the machine after the last step.
type Ending string

// The endings. Exit is for an agent that is not the first process.
const (
	Reboot   Ending = "reboot"
	Poweroff Ending = "poweroff"
	Shell    Ending = "shell"
	Exit     Ending = "exit"
)

// A Phase is one step of an installation, as it is reported.
type Phase string

// The phases, in their order.
const (
	PhaseBoot      Phase = "boot"
	PhaseNetwork   Phase = "network"
	PhaseHello     Phase = "hello"
	PhaseScript    Phase = "script"
	PhasePlan      Phase = "plan"
	PhasePartition Phase = "partition"
	PhaseFetch     Phase = "fetch"
	PhaseFixup     Phase = "fixup"
	PhaseLoader    Phase = "loader"
	PhaseLinger    Phase = "linger"
	PhaseEnd       Phase = "end"
)

// A State is how far a phase is.
type State string

// The states of a phase. A Log event only carries a line for the log; a
// Switched one says how the phase goes on from now on, and why.
const (
	Started  State = "started"
	Progress State = "progress"
	Finished State = "finished"
	Failed   State = "failed"
	Log      State = "log"
	Switched State = "switched"
)

// An Event is one thing that happened on a node.
type Event struct {
	Boot  string    `json:"boot"` // the Hello's
	Seq   int       `json:"seq"`  // from 1, per boot; a repeated event is ignored
	Time  time.Time `json:"time"`
	Phase Phase     `json:"phase"`
	State State     `json:"state"`
	Text  string    `json:"text,omitempty"` // what is being done; the error, when failed; the line, of a log
	Took  float64   `json:"took,omitempty"` // seconds, when finished or failed
	Fetch *Transfer `json:"fetch,omitempty"`
}

// A Transfer is how far the image is.
type Transfer struct {
	Total      int64 `json:"total"` // bytes of the layers
	Done       int64 `json:"done"`  // verified
	FromServer int64 `json:"fromServer"`
	FromPeers  int64 `json:"fromPeers"`
	Uploaded   int64 `json:"uploaded"`
	Peers      int   `json:"peers"` // connected now
	Rate       int64 `json:"rate"`  // bytes a second, lately
}

func (n NIC) String() string { return fmt.Sprintf("%s (%s)", n.Name, n.MAC) }

// ServerName is the name the server's certificate carries, whatever its address.
const ServerName = "rookery"

// SiteFile is where the initramfs keeps the Site.
const SiteFile = "/etc/rookery/site.json"

// A Site is what an agent trusts, packed into its initramfs.
type Site struct {
	Key []byte `json:"key"` // Ed25519 public key, 32 bytes: signs scripts
	CA  string `json:"ca"`  // PEM: issues the server's certificate
}
