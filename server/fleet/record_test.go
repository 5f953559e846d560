package fleet

import (
	"reflect"
	"testing"

	"rookery/wire"
)

// A key that over forgets is one that groups and Defaults cannot say.
func TestOverFillsEveryKey(t *testing.T) {
	all := Settings{
		Image: "a", Layout: "b", Gateway: "c", Nameservers: []string{"d"}, Domain: "e", AuthorizedKeys: []string{"f"},
		KernelArgs: "g", Console: "h", Rack: "r", Transports: []string{"i"}, Mirrors: []string{"j"}, UploadLimit: "k", DownloadLimit: "l", MulticastRate: "m",
		SeedFor: new(0), Ending: wire.Exit, OnFailure: wire.Exit,
	}
	for i := range reflect.TypeFor[Settings]().NumField() {
		if !said(reflect.ValueOf(all).Field(i)) {
			t.Errorf("this test says nothing of %s", reflect.TypeFor[Settings]().Field(i).Name)
		}
	}
	if got := (Settings{Nameservers: []string{}}).over(all); !reflect.DeepEqual(got, all) {
		t.Errorf("over: %+v, want %+v", got, all)
	}
	if got := all.over(program); !reflect.DeepEqual(got, all) {
		t.Errorf("over: %+v, want %+v", got, all)
	}
	from := records{groups: map[string]Group{"x": {Name: "x", Settings: all}}}.settingsFrom(Node{Groups: []string{"x"}})
	for _, s := range from {
		if s.From != "group x" || s.Key == "" {
			t.Errorf("%+v is not from group x", s)
		}
	}
	if len(from) != reflect.TypeFor[Settings]().NumField() {
		t.Errorf("%d settings: %+v", len(from), from)
	}
}
